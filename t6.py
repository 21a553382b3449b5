from tests import fake_cann

fake_cann.start()
import torch

ev=torch.npu.ExternalEvent()
print("before", ev)
ev.wait(torch.npu.current_stream()); print("waited", ev)
ev.record(); print(ev)
ev.wait(torch.npu.current_stream()); print("waited", ev)
