"""Prediction on whole volumes, metrics, pictures and reports."""
