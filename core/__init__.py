"""The few types, errors, settings and device rules that every other part shares."""
