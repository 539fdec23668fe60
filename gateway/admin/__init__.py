"""The API of operators: app, behind access; views: what runs; measuring: how fast KV moves;
token_file: where a token that was drawn is left.
"""
