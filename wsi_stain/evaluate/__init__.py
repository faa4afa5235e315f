"""The judge: metrics on arrays, embeddings, tables and the report page."""
