"""Every fast op against its naive twin: values and every gradient."""
