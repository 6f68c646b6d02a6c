"""Linear inverse problems: measurement operators with adjoint and pseudo-inverse, and the measurements they give."""
