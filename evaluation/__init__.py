"""Datasets, metrics and reports: how good is a ranking?"""
