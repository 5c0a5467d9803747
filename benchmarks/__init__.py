"""What is measured rather than asserted: performance, and the paper's tables in miniature."""
