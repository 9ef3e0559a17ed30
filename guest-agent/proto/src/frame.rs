//! Frames on the vsock stream between the server and the agent.
