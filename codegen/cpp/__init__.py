"""The C++ target: `emit` writes the source, `build` compiles and loads it."""
