"""How good a personalised model is: the metrics, their statistics, the paper's figures, and the report on a bench."""
