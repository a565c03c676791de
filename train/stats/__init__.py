"""What follows from numbers alone: intervals, strata, spikes."""
