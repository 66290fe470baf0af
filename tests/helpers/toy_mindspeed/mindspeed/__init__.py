"""As much of MindSpeed as says who patches when: its features manager, patches by name, its import and ``repatch``."""
