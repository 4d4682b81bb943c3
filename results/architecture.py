"""Loss on held-out images after equal seconds of training, for several shapes of SimpleUNet."""
import sys, json, time, torch
import data, diffusion, runtime, checkpoint
from model import SimpleUNet
from randomness import StepRandom
secs=float(sys.argv[1]); dev=torch.device('cpu')
tr=data.load('folder',sys.argv[2],'train'); te=data.load('folder',sys.argv[2],'test')
batches=data.Batches(tr,64,0,dev); test=data.Batches(te,250,1,dev)
def evaluate(net):
    tot=0
    with torch.no_grad(), runtime.autocast(dev,'auto'):
        for s in range(8):
            rng=StepRandom(123,s); x,y=test(s); sg=diffusion.lognormal_sigma(rng.normal(250,1,1,1))
            o=net(x+sg*rng.normal(*x.shape),sg,y); tot+=(diffusion.karras_weight(sg)*(o-x)**2).mean().item()
    return tot/8
variants=[dict(downsample='first',head=False),dict(downsample='first',head=True),dict(downsample='last',head=True),dict(downsample='first',head=True,blocks=2),dict(downsample='first',head=False,blocks=2)]
for seed in range(1):
  for v in variants:
    torch.manual_seed(seed); net=SimpleUNet(32,**v).to(memory_format=torch.channels_last); ema=checkpoint.EMA(net,.999)
    opt=torch.optim.Adam(net.parameters(),lr=1e-3,fused=True); used=0; step=0; curve=[]
    nexts=[secs/2,secs]
    while nexts:
        t=time.perf_counter()
        rng=StepRandom(seed,step); x,y=batches(step); x=torch.where(rng.uniform(64,1,1,1)<.5,x.flip(-1),x)
        sg=diffusion.lognormal_sigma(rng.normal(64,1,1,1)); xt=(x+sg*rng.normal(*x.shape)).to(memory_format=torch.channels_last)
        with runtime.autocast(dev,'auto'): o=net(xt,sg,y)
        (diffusion.karras_weight(sg)*(o-x)**2).mean().backward(); torch.nn.utils.clip_grad_norm_(net.parameters(),10.)
        opt.step(); opt.zero_grad(); ema.update_parameters(net); step+=1; used+=time.perf_counter()-t
        if used>=nexts[0]:
            nexts.pop(0); curve.append(dict(seconds=round(used,1),steps=step,test_loss=round(evaluate(ema.module),5)))
    print(json.dumps(dict(**v,seed=seed,curve=curve)),flush=True)
