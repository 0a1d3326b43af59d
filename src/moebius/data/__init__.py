"""Documents -> tokens -> packed, mixed, resumable batches."""
