"""The planner: from predicted errors to a width for each state of each tensor.

`decision` chooses the widths, on the frontier of bytes and error that `hull` builds; `selection`
chooses the factors that correct a predicted error, and fits the correction.
"""
