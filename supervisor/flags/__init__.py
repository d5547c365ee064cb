"""The options of ``everstep run``, by groups. Each is declared once: its type, how its text is read, its default, what it means."""
