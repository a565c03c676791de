"""The project's own checks, for anybody's quantizer."""
