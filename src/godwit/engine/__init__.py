"""The order of things: inspect, plan, freeze, capture, build, resume. Never what kind a thing is."""
