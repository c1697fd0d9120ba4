"""How easy each training sample is to learn, and what to do with it."""
