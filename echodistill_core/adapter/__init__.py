"""Adapters: what training learned, as files that stock tools load too, and how a model takes them on."""
