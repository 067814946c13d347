"""Integrations: the rows of the table inside the training programs of others, one file each.

In: the objects of TRL or verl. Out: advantages and losses of `minicpgd.ALGORITHMS`, in the shapes that they need. Each
file needs the extra of its name, and no other package imports from here.
"""
