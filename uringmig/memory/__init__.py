"""Where guest RAM comes from and goes to: buffers and mappings, named by address."""
