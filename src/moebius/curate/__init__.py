"""Raw pages, books and code -> clean documents: readers, steps, and the pipeline that runs them."""
