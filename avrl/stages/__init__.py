"""Stages: what each verb makes, as declarations (config, inputs, slug, build). No torch at module level."""
