"""How compact each layer can be, and which sparsity each one gets."""
