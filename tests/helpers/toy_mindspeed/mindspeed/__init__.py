"""The parts of MindSpeed that determine when it patches: features manager, patches by name, import and ``repatch``."""
