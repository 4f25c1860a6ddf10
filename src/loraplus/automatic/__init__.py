"""The pieces of automatic rates: what the optimizer proposes, the rule, and the groups that get its rates."""
