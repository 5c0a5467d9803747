"""The paper's tables in miniature, on synthetic people and a CPU."""
