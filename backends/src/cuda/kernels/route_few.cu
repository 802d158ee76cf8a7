// The routing of few tokens in a kernel of its own.

KERNEL route_few(ROUTING_PARAMETERS) {
    begin();
    route_and_assign(ROUTING);
}
