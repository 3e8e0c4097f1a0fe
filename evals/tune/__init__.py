"""`vtprune tune`: the search for hyper-parameters under a budget."""
