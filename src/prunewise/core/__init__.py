"""Structure, cost, plans and surgery. Torch only: no files, no printing."""
