"""Noise levels, denoisers over any parametrisation, samplers, guidance and a closed-form mixture to test them on."""
