/* A CANN runtime without a device: device memory is host memory, every stream is synchronous, and so every event is
 * complete when it is recorded, but for those behind a receive (hccl.c), which are when the message has come.
 *
 * Only what torch_npu calls to start, allocate, copy, and order work is here; build.sh adds an error code for the other
 * functions it links to. Functions that torch_npu looks up by name and finds missing it reports itself.
 * Environment: NPU_STUB_DEVICES (default 8), NPU_STUB_SOC (default Ascend910B2), NPU_STUB_MEMORY_MIB (default 65536).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID = 107000, NO_CONTEXT = 107002, NO_MEMORY = 207001 };

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

/* Device and context. A context is the device's number plus one, disguised as a pointer. */

static __thread int32_t current = -1;

int npu_stub_finish_receives(void *stream, const char *data, size_t size);
int npu_stub_is_receiving(void *stream);

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
int aclrtGetDeviceCount(uint32_t *count) { *count = setting("NPU_STUB_DEVICES", 8); return OK; }

int aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= setting("NPU_STUB_DEVICES", 8)) return INVALID;
    current = device;
    return OK;
}

int aclrtGetDevice(int32_t *device) {
    if (current < 0) return NO_CONTEXT;
    *device = current;
    return OK;
}

int aclrtResetDevice(int32_t device) { return OK; }
int aclrtGetCurrentContext(void **context) { *context = (void *)(intptr_t)(current + 1); return current < 0 ? NO_CONTEXT : OK; }
int aclrtSetCurrentContext(void *context) { current = (int32_t)(intptr_t)context - 1; return OK; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { *active = 1; return OK; }
int aclrtSynchronizeDevice(void) { return npu_stub_finish_receives(NULL, NULL, 0); }
int aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return aclrtSynchronizeDevice(); }

const char *aclrtGetSocName(void) {
    const char *name = getenv("NPU_STUB_SOC");
    return name && *name ? name : "Ascend910B2";
}

const char *aclGetRecentErrMsg(void) { return ""; }
int aclrtGetLastError(int flag) { return OK; }
int aclrtPeekAtLastError(int flag) { return OK; }
int aclGetDeviceCapability(uint32_t device, int info, int64_t *value) { *value = 0; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 1; return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
int aclGetCompileopt(int option, char *value, size_t length) { memset(value, 0, length); return OK; }
size_t aclGetCompileoptSize(int option) { return 64; }
int aclSetCompileopt(int option, const char *value) { return OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }

/* The old way of launching operators fails loudly; the new one, libopapi's aclnn functions, is missing altogether. */
int aclopCompileAndExecute(void) { return INVALID; }
int aclopCompileAndExecuteV2(void) { return INVALID; }

/* Memory. */

int aclrtMalloc(void **memory, size_t size, int policy) {
    if (posix_memalign(memory, 512, size ? size : 1)) return NO_MEMORY;
    return OK;
}

int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
int aclrtMallocHost(void **memory, size_t size) { return aclrtMalloc(memory, size, 0); }
int aclrtFree(void *memory) { free(memory); return OK; }
int aclrtFreeHost(void *memory) { free(memory); return OK; }

int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
    *total = (size_t)setting("NPU_STUB_MEMORY_MIB", 65536) << 20;
    *available = *total;
    return OK;
}

int aclrtMemcpy(void *to, size_t limit, const void *from, size_t size, int kind) {
    if (size > limit) return INVALID;
    memmove(to, from, size);
    return OK;
}

int aclrtMemcpyAsync(void *to, size_t limit, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, limit, from, size, kind);
}

int aclrtMemset(void *to, size_t limit, int32_t value, size_t size) {
    if (size > limit) return INVALID;
    memset(to, value, size);
    return OK;
}

int aclrtMemsetAsync(void *to, size_t limit, int32_t value, size_t size, void *stream) {
    return aclrtMemset(to, limit, value, size);
}

/* Streams and events: a stream is a number, an event the time of its recording. */

int aclrtCreateStream(void **stream) { *stream = malloc(8); return OK; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return aclrtCreateStream(stream); }
int aclrtDestroyStream(void *stream) { free(stream); return OK; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
int aclrtSynchronizeStream(void *stream) { return npu_stub_finish_receives(stream, NULL, 0); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout) { return aclrtSynchronizeStream(stream); }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = (int32_t)((intptr_t)stream >> 4); return OK; }
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return OK; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return OK; }

typedef struct { struct timespec time; void *stream; } Event;

int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = calloc(1, sizeof(Event)); return OK; }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
int aclrtDestroyEvent(void *event) { free(event); return OK; }

int aclrtRecordEvent(void *event, void *stream) {
    ((Event *)event)->stream = stream;
    clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->time);
    return OK;
}

int aclrtQueryEventStatus(void *event, int *status) {
    void *stream = ((Event *)event)->stream;
    *status = !stream || !npu_stub_is_receiving(stream);
    return OK;
}

int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return OK; }

int aclrtSynchronizeEvent(void *event) {
    void *stream = ((Event *)event)->stream;
    return stream ? npu_stub_finish_receives(stream, NULL, 0) : OK;
}

int aclrtStreamWaitEvent(void *stream, void *event) { return aclrtSynchronizeEvent(event); }

int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    struct timespec *a = &((Event *)start)->time, *b = &((Event *)end)->time;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
    return OK;
}
