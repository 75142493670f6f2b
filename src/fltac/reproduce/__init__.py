"""Every table and figure of the paper (arXiv 2404.15384), each made by one module that ``registry`` names."""
