"""The API of operators: app, behind access; views: what runs; measuring: how fast KV moves."""
