"""Tests of Godwit."""
