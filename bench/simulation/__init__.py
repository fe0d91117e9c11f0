"""The real scheduler and its memory at the scale of a GPU: a cost model, a virtual clock."""
