"""How several processes train one model: DDP, FSDP2 or DeepSpeed, as the launch file asks, behind one interface."""
