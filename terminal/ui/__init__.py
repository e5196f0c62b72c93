"""What people see and what happens at the device: pictures, words, and the flow that orders them."""
