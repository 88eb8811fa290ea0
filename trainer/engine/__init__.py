"""The engine: DeepSpeed and Accelerate behind one door. No other package imports either."""
