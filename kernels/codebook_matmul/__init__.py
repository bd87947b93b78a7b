"""CodebookMatMul: a product with weights that are indices into codebooks."""
