"""What to run next. Every search has one method, `next(losses)`, and holds no state: all follows from the losses.

pattern.py    compare        one run after another; the budget ends it
halving.py    tune           short runs first, within a budget (parabola.py: where their losses are lowest)
grid.py       reproduce and benchmarks/rates.py    every λ until the best pair lies inside
blocks.py     the toy model  rectangles of (η_A, η_B), each trained at once
"""

from loraplus.study.search.point import Point, Search, best_point

__all__ = ["Point", "Search", "best_point"]
