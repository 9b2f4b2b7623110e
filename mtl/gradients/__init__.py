"""The tasks' gradients: rows, the Gramian, and which task reaches which parameter."""
