"""How a weight becomes integers with scales: one algorithm a file, on matrices [rows, depth]."""
