"""Reports for people: parameter table, comparisons, plots."""
