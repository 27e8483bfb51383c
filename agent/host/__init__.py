"""Read-only facts about the host: users, resolvers, interfaces, tools, listening sockets."""
