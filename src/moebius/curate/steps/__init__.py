"""The steps of curation, one file each; `moebius.curate.step.TABLE` lists them."""
