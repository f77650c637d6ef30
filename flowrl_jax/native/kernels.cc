// Decoding on CPUs, in float32: the products of few rows with kernels, and attention of one token.
//
// XLA's CPU backend packs a kernel anew at each product, which for few rows is most of its time, and
// attends on one core. Here kernels come in panels, which are packed once for many tokens, and work
// is cut into items that XLA's own threads take one by one. What a row gives does not depend on the
// other rows, on threads or on where in the cache its columns lie: every sum has one order.

#include "attention.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

extern "C" {
// Columns of a panel.
int flowrl_panel() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(flowrl_products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("offset"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(flowrl_gated_products, gated_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("offset")
                                  .Attr<float>("slope")
                                  .Attr<float>("cubic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(flowrl_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
}
