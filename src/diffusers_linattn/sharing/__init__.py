"""The files of linear attention: their format, where they come from, what is written about them."""
