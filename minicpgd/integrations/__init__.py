"""The table on other people's engines, one file for each. Nothing else in the package imports from here.

In: the objects that the engine hands over. Out: advantages and losses of `minicpgd.ALGORITHMS`, in the engine's own
shapes. Each file needs the extra of its name.
"""
