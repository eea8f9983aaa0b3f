"""Pictures of pipelines on the same seeds, measures of how close they are, and the report."""
