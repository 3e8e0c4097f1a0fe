"""`vtprune report`: result folders of `vtprune bench` and of lmms-eval as one page and one Markdown file, with paired
errors, wins against dull baselines, and published numbers beside ours."""
