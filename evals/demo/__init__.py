"""`vtprune demo`: a page on which anyone sees what a pruner keeps, what it costs and what it breaks. page.py lays the
page out and server.py serves it (the only files that know gradio); models.py lends the model to several visitors at
once; asking.py, curve.py and failures.py compute, options.py reads what a visitor chose, fates.py tells of patches."""
